"""Other engines inside which LoGo runs, and processes."""
