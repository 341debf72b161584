"""New drafts into service: load aside, shadow-score, canary, promote or roll back."""
