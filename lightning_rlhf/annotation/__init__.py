"""People label pairs in a browser: the queue of pairs, the server, the page, and its client. Needs no torch."""
