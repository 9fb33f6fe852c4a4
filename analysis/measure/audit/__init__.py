"""An auditor of operators, of this package and of others: ``mambabyte audit``.

``kinds`` says what an operator is: its inputs and its definition in float64. ``targets`` calls a
function of any library by that signature. ``checks`` compares. ``run`` does all checks on all
cases, and keeps the inputs on which one failed; ``report`` writes what was found.
"""
