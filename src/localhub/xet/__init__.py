"""The xet side of the Hub: a content-addressed store of chunks that hf_xet talks to over HTTP.

Files are cut into chunks by the client, chunks are packed into xorbs, and a shard tells which chunk
ranges of which xorbs make up which file. Format: https://huggingface.co/docs/xet.
"""
