"""What a checkpoint holds, from headers and metadata alone: `slicecast inspect`."""
