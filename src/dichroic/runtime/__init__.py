"""What computing takes besides mathematics: files, processes, memory, progress, logs."""
