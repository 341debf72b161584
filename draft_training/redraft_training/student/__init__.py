"""How a draft is born: pruned from its target."""
