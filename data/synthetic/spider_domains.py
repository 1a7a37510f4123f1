"""Small relational databases from fourteen hand-written domains: the lexicon and the sampler.

A domain is a handful of tables with synonyms, parents (foreign keys) and columns. `sample_database` draws a connected
subset of 2-4 tables, one synonym per table and column, 3-6 columns per table and 20-80 rows. All domains share one
pool of columns and values, so a new database is a new combination of known words, not a page of alien ones.

Put into the rows on purpose: NULLs (one column of most tables), repeated labels, ties, and neighbours v-1, v, v+1 of
one number, so that >= for >, a forgotten DISTINCT or a wrong aggregate changes results.
"""

from dataclasses import dataclass, field
from random import Random

# Values. The last tenth of each pool appears only in held-out databases (see `known`).
POOLS = {
    "first": "Anna Ben Carla David Elena Frank Grace Hugo Ines Jack Karin Leo Maria Nina Oscar Paul Rosa Sam Tina "
    "Victor Wendy Yara Zoe Omar",
    "last": "Adams Baker Clark Diaz Evans Fischer Garcia Hall Kim Lopez Meyer Novak Olsen Park Rossi Silva Sato Weber",
    "adjective": "Blue Red Green Golden Silver Silent Wild Happy Lost Old New Little Big Dark Bright Royal Calm Lucky",
    "goods": "Lamp Chair Clock Radio Bag Mirror Vase Kettle Basket",
    "books": "River Garden Letter Island Road Dream Storm Forest Bridge",
    "songs": "Moon Heart Dance Rain Summer Night Fire Train Echo",
    "places": "Star Crown Palace Corner Harbor Tower Plaza Lion Arch",
    "animals": "Bella Rocky Daisy Max Luna Coco Buddy Molly Toby",
    "meals": "Soup Salad Pizza Curry Pie Burger Stew Noodles Omelet",
    "topics": "Algebra Biology Drama Music Physics History Poetry Logic Statistics",
    "city": "Oslo Rome Paris Berlin Madrid Vienna Lima Tokyo Dublin Athens",
    "country": "Norway Italy France Germany Spain Austria Peru Japan Ireland Greece",
    "color": "red blue green black white yellow brown",
    "level": "gold silver bronze basic premium",
    "category": "home office travel sport gift kids",
    "genre": "rock jazz pop folk classic crime comedy",
    "day": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday",
    "season": "spring summer autumn winter",
    "status": "open closed planned late done",
    "size": "small medium large tiny huge",
    "department": "sales finance design support law research",
    "language": "English French Spanish German Italian Polish",
    "material": "wood stone steel glass paper clay",
    "position": "keeper defender striker captain reserve",
    "species": "cow goat horse sheep pig hen",
    "quality": "good fair poor great",
    "payment": "cash card check voucher",
    "subject": "math art science geography sports",
    "model": "Falcon Condor Swift Hawk Heron Eagle",
}

# Columns: synonyms -> what the values are. A range is (low, high, step); "year" is a number that is never summed.
# Numbers stay below 100 (years apart), so that a small model spends its time on queries and not on copying digits.
COLUMNS = {
    "age": (18, 80, 1),
    "price cost": (2, 99, 0.5),
    "stock": (0, 99, 1),
    "weight": (1, 99, 0.5),
    "height": (50, 99, 1),
    "length": (10, 99, 0.5),
    "score": (0, 100, 1),
    "points": (0, 99, 1),
    "rating": (1, 10, 0.5),
    "salary wage": (10, 99, 0.5),
    "budget": (5, 95, 0.5),
    "capacity": (20, 99, 1),
    "quantity amount": (1, 20, 1),
    "duration": (10, 99, 0.5),
    "distance": (5, 99, 0.5),
    "floor": (1, 12, 1),
    "beds": (1, 6, 1),
    "pages": (10, 99, 1),
    "wins": (0, 40, 1),
    "goals": (0, 30, 1),
    "visitors": (10, 99, 1),
    "members": (5, 90, 1),
    "area": (5, 99, 0.5),
    "fee": (1, 99, 0.5),
    "discount": (0, 60, 5),
    "rent": (10, 99, 0.5),
    "seats": (20, 99, 1),
    "hours": (1, 60, 1),
    "experience": (0, 40, 1),
    "balance": (0, 95, 0.5),
    "yield": (5, 99, 0.5),
    "year": "year",
    "city town": "city",
    "country": "country",
    "color": "color",
    "level grade": "level",
    "category": "category",
    "genre style": "genre",
    "day": "day",
    "season": "season",
    "status": "status",
    "size": "size",
    "department": "department",
    "language": "language",
    "material": "material",
    "position": "position",
    "species": "species",
    "quality": "quality",
    "payment_method": "payment",
    "subject": "subject",
    "model": "model",
    "home_city": "city",
    "birth_country": "country",
    "release_year": "year",
    "opening_year": "year",
}

# domain: {table synonyms: (parents, label and its pool, columns)}; a table without a label records events.
# Labels: "name:person" is "Anna Adams", "title:books" is "Silent River", "name:animals" is one word of that pool.
DOMAINS = {
    "shop": """
        customer client | | name:person | age city points level birth_country
        product item | | name:goods | price stock weight color category material
        store | | name:places | city size rent opening_year
        sale purchase | customer product store | | quantity discount day payment_method""",
    "library": """
        author writer | | name:person | age country language birth_country
        book novel | author | title:books | pages price genre release_year language
        member reader | | name:person | age city level fee
        loan | book member | | duration fee day quality""",
    "clinic": """
        doctor | | name:person | age department salary experience home_city
        patient | | name:person | age weight height city
        visit appointment | doctor patient | | duration price day status
        ward | | name:places | floor beds size department""",
    "league": """
        team club | | name:places | city budget wins members
        player | team | name:person | age height goals position birth_country
        coach trainer | team | name:person | age salary experience country
        fixture | team | | goals visitors day season""",
    "school": """
        teacher | | name:person | age salary subject experience
        course lesson | teacher | title:topics | hours level fee season
        student pupil | | name:person | age city points country
        exam test | student course | | score duration day status""",
    "museum": """
        artist painter | | name:person | age country genre language
        gallery museum | | name:places | city visitors area opening_year
        painting artwork | artist gallery | title:books | price height material release_year
        ticket | gallery | | price day category payment_method""",
    "airline": """
        pilot | | name:person | age salary country experience
        plane aircraft | | name:places | seats length model status
        flight trip | pilot plane | | distance duration price day
        passenger traveler | flight | name:person | age country level weight""",
    "cinema": """
        director | | name:person | age country experience language
        film movie | director | title:books | duration rating genre release_year
        cinema theater | | name:places | city seats size opening_year
        screening | film cinema | | price visitors day language""",
    "farm": """
        farmer | | name:person | age experience city
        field meadow | farmer | name:places | area size quality distance
        animal | farmer | name:animals | age weight species color
        harvest | field | | yield price season quality""",
    "hotel": """
        hotel | | name:places | city rating capacity opening_year
        room suite | hotel | | floor beds price size
        guest | | name:person | age country level points
        booking reservation | room guest | | duration discount status season""",
    "city": """
        district | | name:places | area members budget quality
        building house | district | name:places | height floor material opening_year
        resident citizen | building | name:person | age salary birth_country points
        park | district | name:books | area visitors size rating""",
    "music": """
        singer musician | | name:person | age country genre home_city
        album record | singer | title:songs | price rating release_year language
        song track | album | title:songs | duration rating genre
        concert gig | singer | | visitors price city day""",
    "restaurant": """
        restaurant cafe | | name:places | city rating seats rent
        cook chef | restaurant | name:person | age salary experience birth_country
        dish meal | restaurant | name:meals | price weight category season
        review | dish | | score day language""",
    "company": """
        office branch | | name:places | city floor rent size
        employee worker | office | name:person | age salary department experience
        project | office | name:songs | budget duration status category
        task | employee project | | hours points quality level""",
}


@dataclass
class Column:
    """kind: "key", "label", "text", "number" or "year"; type: SQLite's; nullable: NULLs were put in."""

    name: str
    kind: str
    type: str
    nullable: bool = False

    @property
    def words(self) -> str:
        return self.name.replace("_", " ")


@dataclass
class Table:
    """columns[0] is the primary key `id`; rows follow the columns; parents: foreign key column -> table name."""

    name: str
    columns: list[Column]
    parents: dict[str, str]
    rows: list[tuple] = field(default_factory=list)

    def values(self, column: Column) -> list:
        at = self.columns.index(column)
        return [row[at] for row in self.rows]


@dataclass
class Database:
    name: str
    tables: list[Table]

    def table(self, name: str) -> Table:
        return next(table for table in self.tables if table.name == name)


def known(pool: str, held_out: bool) -> list[str]:
    """The words of a pool; databases that are not held out never show its last tenth (at least one word)."""
    words = POOLS[pool].split()
    return words if held_out else words[: len(words) - max(1, len(words) // 10)]


def sample_database(name: str, domain: str, random: Random, *, held_out: bool) -> Database:
    """A database of `domain` with rows. Parents come before children in `tables`."""
    lexicon = {}
    for line in DOMAINS[domain].strip().splitlines():
        names, parents, label, columns = (part.strip() for part in line.split("|"))
        lexicon[names.split()[0]] = (names.split(), parents.split(), label, columns.split())
    chosen = _connected(lexicon, random)
    called = {table: random.choice(lexicon[table][0]) for table in chosen}
    tables = []
    for key in chosen:
        _, parents, label, columns = lexicon[key]
        foreign = {f"{called[p]}_id": called[p] for p in parents if p in called}
        layout = [Column("id", "key", "INTEGER")]
        if label:
            layout.append(Column(label.split(":")[0], "label", "TEXT"))
        room = 6 - len(layout) - len(foreign)
        count = random.randint(min(2, room), min(3, room, len(columns)))
        picked = [_column(c, random) for c in random.sample(columns, count)]
        if random.random() < 0.7:
            random.choice(picked).nullable = True
        layout += picked + [Column(c, "key", "INTEGER") for c in foreign]
        tables.append(Table(called[key], layout, foreign))
    database = Database(name, tables)
    for table, key in zip(tables, chosen, strict=True):
        _fill(table, database, lexicon[key][2], random, held_out)
    return database


def _connected(lexicon: dict, random: Random) -> list[str]:
    """Names of 2-4 tables that hang together by foreign keys, in the order of the lexicon."""
    edges = [(child, parent) for child, (_, parents, _, _) in lexicon.items() for parent in parents]
    chosen = set(random.choice(edges))
    for _ in range(random.choices((0, 1, 2), (6, 3, 1))[0]):
        border = sorted({b if a in chosen else a for a, b in edges if (a in chosen) != (b in chosen)})
        if border:
            chosen.add(random.choice(border))
    return [table for table in lexicon if table in chosen]


def _spec(column: str):
    return next(spec for names, spec in COLUMNS.items() if column in names.split())


def _column(column: str, random: Random) -> Column:
    names, spec = next((names.split(), spec) for names, spec in COLUMNS.items() if column in names.split())
    name = random.choice(names)
    if spec == "year":
        return Column(name, "year", "INTEGER")
    if isinstance(spec, str):
        return Column(name, "text", "TEXT")
    return Column(name, "number", "REAL" if spec[2] == 0.5 else "INTEGER")


def _fill(table: Table, database: Database, label: str, random: Random, held_out: bool) -> None:
    is_child = bool(table.parents)
    n = random.randint(40, 80) if is_child and not label else random.randint(20, 45)
    cells = [_cells(column, n, label, random, held_out) for column in table.columns]
    for at, column in enumerate(table.columns):
        if column.name in table.parents:
            size = len(database.table(table.parents[column.name]).rows)
            active = random.sample(range(1, size + 1), max(4, size * 3 // 5))  # the others have no child
            cells[at] = [random.choice(active) for _ in range(n)]
    table.rows = list(zip(*cells, strict=True))


def _cells(column: Column, n: int, label: str, random: Random, held_out: bool) -> list:
    if column.kind == "key":
        return list(range(1, n + 1))
    if column.kind == "label":
        cells = _labels(label.split(":")[1], n, random, held_out)
    elif column.kind == "text":
        pool = known(_spec(column.name), held_out)
        few = random.sample(pool, min(len(pool), random.randint(4, 6)))
        cells = [random.choice(few + few[:2]) for _ in range(n)]
    elif column.kind == "year":
        cells = [random.randint(1990, 2020) for _ in range(n)]
    else:
        low, high, step = _spec(column.name)
        grid = range(round((high - low) / step) + 1)
        tie_free = len(grid) >= 2 * n and random.random() < 0.6
        steps = random.sample(grid, n) if tie_free else [random.choice(grid) for _ in range(n)]
        if not tie_free:  # three rows just around a fourth, and a tie
            near = random.randrange(1, len(grid) - 1)
            for row, at in zip(random.sample(range(n), 4), (near - 1, near, near, near + 1), strict=True):
                steps[row] = at
        cells = [low + at * step for at in steps]
        cells = [float(v) if column.type == "REAL" else v for v in cells]
    if column.nullable:
        for row in random.sample(range(n), random.randint(2, max(2, n // 6))):
            cells[row] = None
    return cells


def _labels(pool: str, n: int, random: Random, held_out: bool) -> list[str]:
    if pool == "person":
        first, last = known("first", held_out), known("last", held_out)
        cells = [f"{random.choice(first)} {random.choice(last)}" for _ in range(n)]
    elif pool in ("animals", "topics"):
        cells = [random.choice(known(pool, held_out)) for _ in range(n)]
    else:
        adjectives, nouns = known("adjective", held_out), known(pool, held_out)
        cells = [f"{random.choice(adjectives)} {random.choice(nouns)}" for _ in range(n)]
    for _ in range(max(1, n // 12)):  # repeated labels: grouping by the label is not grouping by the key
        source, target = random.sample(range(n), 2)
        cells[target] = cells[source]
    return cells
