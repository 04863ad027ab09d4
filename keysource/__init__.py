"""Key sources, key managers and QKD links: everything that makes or stores keys; usable without qvpn."""
