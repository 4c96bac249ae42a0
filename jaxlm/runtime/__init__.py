"""What a run needs of its machines: processes, signals, an allocator, and storage."""
