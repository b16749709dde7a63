"""Pages for people: what is on this Hub, its files, pull requests and their diffs."""
