"""Every pair of features in few cases: a greedy covering array over named factors."""

import itertools


def pairs(case):
    """Every pair of (factor, level) that a case holds, in the order of its factors."""
    return set(itertools.combinations(case.items(), 2))


def all_pairs(factors):
    """Every pair of levels of two factors."""
    choices = [[(name, level) for level in levels] for name, levels in factors.items()]
    return [pair for a, b in itertools.combinations(choices, 2) for pair in itertools.product(a, b)]


def complete(case, factors, fits, preference=lambda case, choice: 0):
    """`case` with a level for every factor, or None where the rules leave none. `fits` judges partial cases, and finds
    a contradiction sooner when the factors that it relates come first."""
    if not fits(case):
        return None
    name = next((name for name in factors if name not in case), None)
    if name is None:
        return {name: case[name] for name in factors}
    for level in sorted(factors[name], key=lambda level: preference(case, (name, level))):
        if found := complete({**case, name: level}, factors, fits, preference):
            return found
    return None


def covering_array(factors, fits):
    """Cases, dicts of factor -> level, which together hold every pair of levels that the rules allow."""
    uncovered = dict.fromkeys(all_pairs(factors))
    used = dict.fromkeys(((name, level) for name, levels in factors.items() for level in levels), 0)

    def preference(case, choice):
        news = sum((chosen, choice) in uncovered or (choice, chosen) in uncovered for chosen in case.items())
        return -news, used[choice]

    cases = []
    while uncovered:
        pair = next(iter(uncovered))
        del uncovered[pair]
        if case := complete(dict(pair), factors, fits, preference):
            cases.append(case)
            for covered in pairs(case):
                uncovered.pop(covered, None)
            for choice in case.items():
                used[choice] += 1
    return cases
