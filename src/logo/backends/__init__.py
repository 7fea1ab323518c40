"""Other engines that LoGo runs inside."""
