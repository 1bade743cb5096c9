"""What the tests share and users do not need; what users can use as well is in sapper.testing."""
