"""Where jobs run: one small interface, one file per place.

base.py      the interface, and what the command line of a job is
child.py     the process in which a merge runs, here or in a container
local.py     on this machine
github.py    in a repository with the action, through repository_dispatch
hf_jobs.py   on Hugging Face Jobs
"""
