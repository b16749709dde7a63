"""A Hugging Face Hub on localhost, for tests and for the demo.

    python -m localhub --port 8080 --data ./hub --token alice=hf_alice
    HF_ENDPOINT=http://127.0.0.1:8080 HF_TOKEN=hf_alice hf upload alice/model ./folder

`localhub.process.LocalHub` runs one for the length of a `with` block, and `localhub.faults.FaultProxy`
breaks the connection to it on purpose. How the parts lie on each other:

    api/, pages/                                  HTTP: routes, permissions, JSON, HTML
    hub                                           all parts of one Hub on one data folder
    repositories, accounts, community, shelves    records, in one SQLite file (database)
    webhooks, delivery, jobs, oidc                what the Hub does by itself, and whom it trusts
    git, commits, pointers, attributes            bare git repositories
    large, xet/                                   large files by their hash, whole or in chunks
"""
