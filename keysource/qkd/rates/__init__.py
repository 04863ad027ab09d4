"""How much key a block may give: entropy and the finite-key bounds by name."""
