#![cfg_attr(not(test), no_std)]
//! Placeholder, replaced in the next commit.
