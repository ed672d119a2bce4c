"""The gradwatch server: stores what agents measure, diagnoses it, shows it, delivers alerts. It never imports torch."""
