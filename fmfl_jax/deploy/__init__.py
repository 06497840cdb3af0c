"""The same federation on separate machines: the client half at the nodes, the server half beside Flower's SuperLink."""
