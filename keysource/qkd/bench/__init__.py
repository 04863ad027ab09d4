"""``qvpn-qkd bench``: the link's parts in a second, beside the targets and beside installed peers."""
