"""The flights that left New York in 2013, served: definitions, data and a demonstration."""
