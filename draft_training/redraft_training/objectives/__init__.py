"""What a draft is taught: divergences and losses between teacher and student, and their presets."""
