//! Descriptors of every kind through the suite.
