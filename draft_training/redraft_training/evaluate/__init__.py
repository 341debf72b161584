"""How good a draft is: expected acceptance, replay, intervals, reports."""
