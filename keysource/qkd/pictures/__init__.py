"""Plots of the link, drawn from what a run or a formula gave.  They need ``pip install 'qvpn[plots]'``."""
