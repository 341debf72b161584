"""The draft registry: manifests, atomic publish, pin, roll back."""
