"""`merge-adapter demo`: the whole job on an embedded Hub, with models that ship with the package."""

from merge_adapter.demo.story import run_demo

__all__ = ["run_demo"]
