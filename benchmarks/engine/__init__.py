"""Where redraft's time goes: forward passes beside their floors, shares of a step, and what each part costs."""
