//! (shutdown)
