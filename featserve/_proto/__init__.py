"""Messages and stubs generated from protos/ by `make protos`: change the .proto files, never these."""
