"""Exercises of notebook 00: a map with a low-rank change, and by what factor the change is smaller than the map."""

from prosg_lib.exercises.checking import Exercise, Mistake, random_tensors

# 0.1


def changed_map(x, W, U, V, s):
    """What a linear map answers with a low-rank change beside its weight, which is not written.

    Args:
        x: inputs, one row a token, (tokens, in).
        W: the map's weight, (out, in).
        U, V: the change, (out, r) and (in, r).
        s: its scale, a number.
    Returns:
        (tokens, out).
    """
    return x @ W.T + s * (x @ V) @ U.T


def _by_sum(x, W, U, V, s):
    return x @ (W + s * U @ V.T).T


def _map_inputs(tokens, inputs, outputs, rank, seed):
    shapes = (tokens, inputs), (outputs, inputs), (outputs, rank), (inputs, rank)
    return *random_tensors(*shapes, seed=seed), 0.1


# 0.2


def times_smaller(inputs, outputs, rank):
    """By what factor a change of a map has fewer numbers than the map.

    Args:
        inputs, outputs, rank: the map is (outputs, inputs), the change U (outputs, rank) and V (inputs, rank).
    Returns:
        The numbers of the map for each number of the change.
    """
    return inputs * outputs / (rank * (inputs + outputs))


EXERCISES = (
    Exercise(
        number="0.1",
        title="a map with a delta beside it",
        stars=1,
        minutes=5,
        task="Write the formula above for many tokens at once. Do not form a matrix of the size of $W$.",
        hint="Tokens are rows here, so $W x$ becomes `x @ W.T`. What the change reads is `x @ V`, r numbers a token.",
        solution=changed_map,
        expected=_by_sum,
        cases=lambda: [_map_inputs(5, 6, 4, 2, seed=0), _map_inputs(3, 4, 7, 1, seed=10)],
        results=("y",),
        why="The work grows with r, not with the size of the map, and every text of a batch can have a U of its own.",
        mistakes=(
            Mistake(
                lambda x, W, U, V, s: x @ W.T + (x @ V) @ U.T, "The scale s is missing: it multiplies the second term."
            ),
            Mistake(
                lambda x, W, U, V, s: s * (x @ W.T + (x @ V) @ U.T), "s scales the change alone; W x stays as it is."
            ),
            Mistake(
                lambda x, W, U, V, s: s * (x @ V) @ U.T,
                "That is the change alone. The map's own answer W x is missing.",
            ),
            Mistake(
                lambda x, W, U, V, s: x @ W.T - s * (x @ V) @ U.T,
                "The change is added. (A gradient step subtracts; here the sign is in U.)",
            ),
        ),
        misconception="That the weights have to be written to be changed. The sum of two answers is the answer of the "
        "sum of two maps.",
        discussion=(
            "What would it cost to write W + s U V^T instead, for a batch of 32 different prompts?",
            "If r is as large as in and out, can any change be written as U V^T?",
        ),
    ),
    Exercise(
        number="0.2",
        title="how thin is thin?",
        stars=1,
        minutes=3,
        task="By what factor has a delta, $U$ and $V$ together, fewer numbers than its map? Try (128, 128, 32) and "
        "(4096, 4096, 32) afterwards.",
        hint="Count the numbers of each of the three matrices.",
        solution=times_smaller,
        expected=lambda inputs, outputs, rank: 1 / (rank / outputs + rank / inputs),
        cases=lambda: [(128, 128, 32), (128, 512, 16), (512, 128, 1)],
        results=("factor",),
        why="At width 128 a delta of rank 32 is half its map; at width 4,096 it is a sixty-fourth. Low rank pays where "
        "maps are wide.",
        mistakes=(
            Mistake(
                lambda inputs, outputs, rank: inputs * outputs / (rank * outputs),
                "That counts U alone. V has rank times inputs numbers, too.",
            ),
            Mistake(
                lambda inputs, outputs, rank: inputs * outputs / (rank * inputs),
                "That counts V alone. U has rank times outputs numbers, too.",
            ),
            Mistake(
                lambda inputs, outputs, rank: rank * (inputs + outputs) / (inputs * outputs),
                "Upside down: count the map's numbers for each number of the change.",
            ),
            Mistake(
                lambda inputs, outputs, rank: inputs * outputs / (rank * inputs * rank * outputs),
                "U and V are kept side by side, so their numbers add up; multiplied they would be the map again.",
            ),
        ),
        misconception="That low rank always means small. At this model's width it is half a map.",
        discussion=("All prompts share V. What does a second prompt cost, then?",),
    ),
)
