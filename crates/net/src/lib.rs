//! Network links behind one trait
