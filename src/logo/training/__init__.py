"""Training a pool: one LoRA adapter per task, one after the other on one loaded base model.

tasks (files of examples) -> examples (tokens) -> a learner per task (a PEFT model, AdamW, a loop over the rows)
  -> adapters, as PEFT writes them
"""
