"""Adapter module names -> tensors of the checkpoint on disk.

`direct` answers with json alone for the architectures whose names in memory are their names on disk;
`conversion` answers for all others through transformers' own loading rules, on a model without weights.
"""
