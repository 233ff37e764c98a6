"""The HTML report: one self-contained page and its data as CSV. `build.build` is the entry."""
