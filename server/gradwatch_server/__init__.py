"""The gradwatch server: stores what agents measure, diagnoses it, shows it and delivers alerts. It never imports torch."""
