"""report.html: a run folder as one page that needs nothing else, neither a network nor the folder."""
