"""What the bundled demo world is made with: its tasks and their rows, the pretraining, the adapters, the measurement.

    PYTHONPATH=tools python -m demo_world.build --out src/logo/demo/assets --seed 0     (`make demo-assets`)

The package `logo.demo` holds what this writes, and nothing of the installed package imports anything from here.
"""
