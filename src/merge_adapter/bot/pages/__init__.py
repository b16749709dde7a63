"""The web page: log in with the Hub, see the plan, watch the merge, read the verdict.

routes.py    what each address shows
login.py     the Hub's login, and sessions
forms.py     what a form sends, checked
preview.py   the plan, made in a process of its own
render.py    templates, and the headers that keep a page harmless
"""
