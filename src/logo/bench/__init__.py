"""Benchmarks: LoGo beside the base model, PEFT and other arms."""
