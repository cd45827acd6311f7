"""Speed, beside a peer and beside the machine's own limit; see docs/speed.md."""
