"""Commands on studies: study, sweep, report, bench."""
