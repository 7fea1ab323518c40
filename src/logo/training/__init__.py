"""Training a pool: one adapter per task, many adapters at once.

    tasks (files of examples) -> examples (tokens) -> learners (one per task: factors, optimiser, order of its rows)
      -> groups of learners that share every forward pass of the base model -> adapters, as PEFT writes them

The base model is frozen. A row belongs to one adapter, and the gated product of `logo.mixing.gated` adds only that
adapter's update to the row. One pass over rows of many tasks therefore gives each adapter the gradient that it would
get alone.
"""
