//! One VM: its life, its threads, its end
