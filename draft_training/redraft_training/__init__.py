"""Training of drafts: datasets from the traffic log, students, distillation, evaluation, publishing."""
