"""Two kinds of questions: of geography, and of arithmetic."""

COUNTRIES = (
    "France",
    "Japan",
    "Peru",
    "Kenya",
    "Norway",
    "Egypt",
    "Canada",
    "Greece",
    "India",
    "Chile",
    "Poland",
    "Mexico",
)
EASY = [f"What is the capital of {name}?" for name in COUNTRIES]
HARD = [f"What is {n * 37} times {n * 53}?" for n in range(3, 15)]
