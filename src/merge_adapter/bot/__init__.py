"""The Hub bot: webhooks in, verified merges out.

settings.py   every knob, from a TOML file or the environment
store.py      one SQLite file: many readers, one writer with group commit
jobs.py       what a job is
queue.py      jobs on their way: submitted, leased, retried, finished
inbox.py      webhook events, stored before they are answered
events.py     what a webhook says, and what of it is worth looking at
intake.py     events looked up on the Hub and turned into jobs
commands.py   `@bot merge …` in comments
worker.py     takes jobs from the queue and hands them to a runner
runners/      where a merge runs: here, on GitHub Actions, on Hugging Face Jobs
app.py        the HTTP side: webhook, health, metrics, pages
pages/        the web page
server.py     all of it, started and stopped
cli.py        `serve`, `webhook`, `backfill`

Nothing here is imported by the core or by the other commands.
"""
