"""From Hub to Hub with little disk: a shard is here only while it is merged, judged and sent.

    needs.py    what a merge takes of the disk, and whether it can pass through at all
    units.py    which shards must be here at the same time
    ledger.py   who may take how much of the disk, so that the work never stops for want of it
    window.py   a folder with the files of a repository, of which only what is in use takes space
    place.py    the folders of one job
    relay.py    the four stages side by side: fetch, merge, judge, send
    paging.py   weights brought here when they are read, for the outputs part
    outputs.py  the outputs part on what the Hub serves
    run.py      the whole job (tally.py adds it up, shown.py shows it)
    ahead.py    shards fetched while the ones before them merge, where the disk holds them all

The merge and the gate know nothing of this: they see folders.
"""
