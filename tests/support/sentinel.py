"""Does every statement say whose things it touches? Finds those that could touch another user's.

A statement passes when each user's table in it (by whatever alias, at whatever depth) has its owner column made equal to something
that came in as a parameter: the parameter itself, or a column that is equal to one: of unnest($n), of a subquery or CTE fed from
it, of another table so constrained. An inserted row must supply such an owner. An equality counts where no row can get round it: a
conjunct of WHERE or of an inner join's ON, and of an outer join's ON for the side that may be missing. Where the checker cannot
tell, the statement does not pass.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pglast
from pglast import enums, parse_sql
from pglast.parser import ParseError

from service.ids import SYSTEM_USER_ID
from service.store.tables import metadata
from tests.support.cluster import LoggedStatement

# Its types say that anything may be missing anywhere; the grammar says what is there.
ast: Any = pglast.ast

OWNERS = {name: "user_id" for name, table in metadata.tables.items() if "user_id" in table.c} | {
    "users": "id"
}
"""The tables of users' things, and the column of each that says whose a row is."""

_COLUMNS = "SELECT [^;]*"
NAMED = {
    "list users": rf"{_COLUMNS} FROM users WHERE users\.id > \$1::UUID ORDER BY users\.id LIMIT \$2::INTEGER",
    "look a user up by e-mail address": (
        rf"{_COLUMNS} FROM users WHERE lower\(users\.email\) = lower\(\$1::VARCHAR\) AND users\.id != \$2::UUID"
    ),
    "look a user up by external id": (
        rf"{_COLUMNS} FROM users WHERE users\.external_id = \$1::VARCHAR AND users\.id != \$2::UUID"
    ),
    "claim from the outbox": (
        r"WITH due AS \( SELECT o\.kind, o\.user_id, o\.entity_id FROM search_outbox AS o [^;]* FOR UPDATE OF o SKIP LOCKED \) "
        r"UPDATE search_outbox AS o SET lease_id = \$2, [^;]*"
    ),
    "count what the outbox holds": r"SELECT count\(\*\)[^;]* FROM search_outbox",
    "name one thing that the outbox has given up": r"SELECT min\([^;]*\) FROM search_outbox WHERE due_at = 'infinity'",
    "try again what was given up": (
        r"UPDATE search_outbox SET due_at = now\(\), attempts = 0 WHERE due_at = 'infinity'"
    ),
    "rebuild the search index: count what there is": r"UPDATE search_indexes SET building = \$3, [^;]*",
    "rebuild the search index: how far it is": r"SELECT i\.building, [^;]* FROM search_indexes AS i WHERE i\.alias = \$1",
    "rebuild the search index: owe a slice of everything": (
        r"WITH slice AS \( SELECT t\.user_id, t\.id FROM (documents|chat_sessions) AS t [^;]*"
    ),
}
"""The statements that may do without an owner, whole, with any run of white space as one space."""

# Migrations: they change tables, not rows.
_DDL = (
    ast.CreateStmt, ast.IndexStmt, ast.AlterTableStmt, ast.DropStmt, ast.RenameStmt, ast.CommentStmt, ast.CreateStatsStmt,
    ast.VacuumStmt,
)  # fmt: skip


def complaints(statements: Iterable[LoggedStatement]) -> list[str]:
    """Return what is wrong with these statements, in words."""
    return [
        f"{problem}\nin a statement of {statement.application!r} in {statement.database!r}:\n{statement.sql}"
        for statement in dict.fromkeys(statements)
        for problem in problems(statement.sql)
    ]


@functools.cache
def problems(sql: str) -> tuple[str, ...]:
    """Return in what places a statement could touch another user's things."""
    flat = " ".join(sql.split()).rstrip("; ")
    if any(re.fullmatch(pattern, flat) for pattern in NAMED.values()):
        return ()
    try:
        statements = parse_sql(sql)
    except ParseError as error:
        return (f"the statement cannot be read: {error}",)
    checker = _Checker()
    for statement in statements:
        checker.statement(statement.stmt)
    return tuple(dict.fromkeys(checker.found))


@dataclass(eq=False)
class _Relation:
    """One name in a FROM clause, or a target."""

    name: str
    columns: list[str] | None = None
    """Its columns in order; None when they are not known."""
    safe: set[str] = field(default_factory=set)
    """Those columns that are known to hold only what came in as a parameter."""
    all_safe: bool = False
    table: str | None = None
    """The user's table that it is, if any."""

    def is_safe(self, column: str) -> bool:
        return self.all_safe or column in self.safe

    def has(self, column: str) -> bool | None:
        return None if self.columns is None else column in self.columns


@dataclass(eq=False)
class _Scope:
    """The relations that an expression can name."""

    relations: list[_Relation]
    parent: _Scope | None = None

    def find(self, reference: ast.ColumnRef) -> tuple[_Relation, str] | None:
        """Return the relation and the column that are meant, or None when that cannot be told."""
        names = [getattr(part, "sval", None) for part in reference.fields]
        if None in names or len(names) > 2:
            return None
        column = str(names[-1])
        if len(names) == 2:
            matching = [relation for relation in self.relations if relation.name == names[0]]
        elif len(self.relations) == 1:
            matching = [] if self.relations[0].has(column) is False else self.relations
        else:
            matching = [
                relation for relation in self.relations if relation.has(column) is not False
            ]
        if len(matching) > 1:
            return None
        if matching:
            return matching[0], column
        return self.parent.find(reference) if self.parent else None

    def safe(self, expression: Any) -> bool:
        """Whether an expression holds only what came in as a parameter."""
        match expression:
            case ast.ParamRef():
                return True
            case ast.TypeCast():
                return self.safe(expression.arg)
            case ast.A_Const():
                return getattr(expression.val, "sval", None) == SYSTEM_USER_ID
            case ast.ColumnRef():
                found = self.find(expression)
                return found is not None and found[0].is_safe(found[1])
            case ast.A_ArrayExpr():
                return all(map(self.safe, expression.elements or ()))
            case ast.FuncCall():
                return _name(expression.funcname) == "unnest" and all(
                    map(self.safe, expression.args or ())
                )
            case tuple():
                return all(map(self.safe, expression))
        return False


Output = list[tuple[str, bool]]
"""What a query gives: its columns' names, and whether each is safe."""


@dataclass(eq=False)
class _Equality:
    """A condition that no row gets round: these two are equal, for what it can tell about these relations."""

    left: Any
    right: Any
    about: list[_Relation]


class _Checker:
    def __init__(self) -> None:
        self.found: list[str] = []

    def statement(self, node: Any) -> None:
        match node:
            case ast.SelectStmt() | ast.InsertStmt() | ast.UpdateStmt() | ast.DeleteStmt():
                self._query(node, None, {})
            case (
                ast.ExplainStmt()
                | ast.DeclareCursorStmt()
                | ast.PrepareStmt()
                | ast.CreateTableAsStmt()
            ):
                self.statement(node.query)
            case _ if isinstance(node, _DDL):
                pass
            case ast.DoStmt() | ast.CreateFunctionStmt() | ast.CallStmt():
                self.found.append("what it does cannot be told")
            case _:
                tables = {
                    each.relname for each in nodes_of(node) if isinstance(each, ast.RangeVar)
                } & set(OWNERS)
                self.found += [
                    f"{table} is touched by a {type(node).__name__}" for table in sorted(tables)
                ]

    def _query(self, node: Any, parent: _Scope | None, ctes: dict[str, Output]) -> Output:
        ctes = self._ctes(node, parent, ctes)
        match node:
            case ast.SelectStmt():
                return self._select(node, parent, ctes)
            case ast.InsertStmt():
                return self._insert(node, parent, ctes)
            case ast.UpdateStmt():
                return self._change(node, node.fromClause, node.targetList, parent, ctes)
            case ast.DeleteStmt():
                return self._change(node, node.usingClause, (), parent, ctes)
        self.statement(node)
        return []

    def _ctes(
        self, node: Any, parent: _Scope | None, outer: dict[str, Output]
    ) -> dict[str, Output]:
        known = dict(outer)
        for cte in node.withClause.ctes if getattr(node, "withClause", None) else ():
            known.pop(cte.ctename, None)  # It hides what is outside.
            if node.withClause.recursive:
                # Seen from within it gives nothing that could be trusted.
                known[cte.ctename] = []
            output = self._query(cte.ctequery, parent, known)
            known[cte.ctename] = _renamed(output, cte.aliascolnames)
        return known

    def _select(self, node: Any, parent: _Scope | None, ctes: dict[str, Output]) -> Output:
        if node.op != enums.SetOperation.SETOP_NONE:
            sides = [self._query(side, parent, ctes) for side in (node.larg, node.rarg)]
            return [(left[0], left[1] and right[1]) for left, right in zip(*sides, strict=False)]
        scope = _Scope([], parent)
        if node.valuesLists:
            self._subqueries(node.valuesLists, scope, ctes)
            rows = [[scope.safe(value) for value in row] for row in node.valuesLists]
            return [
                (f"column{n}", all(column)) for n, column in enumerate(zip(*rows, strict=True), 1)
            ]
        equalities: list[_Equality] = []
        expressions: list[Any] = []
        for item in node.fromClause or ():
            self._from(item, scope, ctes, equalities, expressions)
        self._settle(scope, [*equalities, *self._conjuncts(node.whereClause, scope, ctes, None)])
        expressions += [
            node.whereClause, node.targetList, node.havingClause, node.groupClause, node.sortClause, node.limitCount, node.limitOffset,
            node.windowClause, node.distinctClause,
        ]  # fmt: skip
        self._subqueries(expressions, scope, ctes)
        return self._output(node.targetList, scope)

    def _insert(self, node: Any, parent: _Scope | None, ctes: dict[str, Output]) -> Output:
        table = node.relation.relname
        owner = OWNERS.get(table)
        source = self._query(node.selectStmt, parent, ctes) if node.selectStmt else []
        target = _table(node.relation)
        scope = _Scope([target], parent)
        if owner is not None:
            names = [column.name for column in node.cols or ()]
            given = dict(zip(names, (safe for _, safe in source), strict=False))
            if not given.get(owner):
                self.found.append(f"{table}: an inserted row's {owner} is not a parameter")
            target.safe.add(owner)
        conflict = node.onConflictClause
        if conflict is not None and conflict.action == enums.OnConflictAction.ONCONFLICT_UPDATE:
            excluded = _Relation("excluded", target.columns, set(target.safe))
            inner = _Scope([target, excluded], parent)
            if owner is not None:
                found_by = [
                    element.name
                    for element in (conflict.infer.indexElems if conflict.infer else None) or ()
                ]
                if owner not in found_by:
                    target.safe.discard(owner)
                    self._settle(inner, [*self._conjuncts(conflict.whereClause, inner, ctes, None)])
                self._check_set(conflict.targetList, table, inner)
            self._subqueries([conflict.targetList, conflict.whereClause], inner, ctes)
        self._subqueries([node.returningClause and node.returningClause.exprs], scope, ctes)
        return self._output(node.returningClause and node.returningClause.exprs, scope)

    def _change(
        self,
        node: Any,
        sources: Any,
        assignments: Any,
        parent: _Scope | None,
        ctes: dict[str, Output],
    ) -> Output:
        scope = _Scope([_table(node.relation)], parent)
        equalities: list[_Equality] = []
        expressions: list[Any] = []
        for item in sources or ():
            self._from(item, scope, ctes, equalities, expressions)
        self._settle(scope, [*equalities, *self._conjuncts(node.whereClause, scope, ctes, None)])
        self._check_set(assignments, node.relation.relname, scope)
        returning = node.returningClause and node.returningClause.exprs
        self._subqueries([*expressions, node.whereClause, assignments, returning], scope, ctes)
        return self._output(returning, scope)

    def _check_set(self, assignments: Any, table: str, scope: _Scope) -> None:
        owner = OWNERS.get(table)
        for target in assignments or ():
            if target.name == owner and not scope.safe(target.val):
                self.found.append(f"{table}: {owner} is set to what is not a parameter")

    def _from(
        self,
        item: Any,
        scope: _Scope,
        ctes: dict[str, Output],
        equalities: list[_Equality],
        expressions: list[Any],
    ) -> list[_Relation]:
        """Add what an item of a FROM clause brings; return its relations."""
        if isinstance(item, ast.JoinExpr):
            left = self._from(item.larg, scope, ctes, equalities, expressions)
            right = self._from(item.rarg, scope, ctes, equalities, expressions)
            about = {
                enums.JoinType.JOIN_INNER: left + right,
                enums.JoinType.JOIN_LEFT: right,
                enums.JoinType.JOIN_RIGHT: left,
            }.get(item.jointype, [])
            equalities += self._conjuncts(item.quals, scope, ctes, about)
            expressions.append(item.quals)
            return left + right
        match item:
            case ast.RangeVar() if item.relname in ctes and not item.schemaname:
                made = _of_output(_alias(item) or item.relname, ctes[item.relname])
            case ast.RangeVar():
                made = _table(item)
            case ast.RangeSubselect():
                output = self._query(item.subquery, scope if item.lateral else scope.parent, ctes)
                colnames = item.alias.colnames if item.alias else None
                made = _of_output(_alias(item) or "", _renamed(output, colnames))
            case ast.RangeFunction():
                functions = [call for call, _ in item.functions]
                names = [each.sval for each in (item.alias.colnames if item.alias else None) or ()]
                made = _Relation(
                    _alias(item) or "", names or None, all_safe=all(map(_Scope([]).safe, functions))
                )
                expressions.append(functions)
            case _:
                self.found.append(f"a {type(item).__name__} cannot be read")
                return []
        scope.relations.append(made)
        return [made]

    def _conjuncts(
        self, expression: Any, scope: _Scope, ctes: dict[str, Output], about: list[_Relation] | None
    ) -> Iterator[_Equality]:
        """Find the equalities that hold for every row; `about` None: for all relations of the scope."""
        relations = scope.relations if about is None else about
        match expression:
            case ast.BoolExpr() if expression.boolop == enums.BoolExprType.AND_EXPR:
                for part in expression.args:
                    yield from self._conjuncts(part, scope, ctes, about)
            case ast.A_Expr() if _name(expression.name) == "=" and expression.kind in (
                enums.A_Expr_Kind.AEXPR_OP,
                enums.A_Expr_Kind.AEXPR_IN,
                enums.A_Expr_Kind.AEXPR_OP_ANY,
            ):
                left, right = expression.lexpr, expression.rexpr
                rows = isinstance(left, ast.RowExpr) and isinstance(right, ast.RowExpr)
                for pair in zip(left.args, right.args, strict=True) if rows else [(left, right)]:
                    yield _Equality(*pair, relations)
            case ast.SubLink() if (
                expression.subLinkType == enums.SubLinkType.ANY_SUBLINK and not expression.operName
            ):
                # Looked at for its columns alone; what is wrong in it is found when all subqueries are.
                output = _Checker()._query(expression.subselect, scope, ctes)
                tested = expression.testexpr
                columns = tested.args if isinstance(tested, ast.RowExpr) else [tested]
                for column, (_, safe) in zip(columns, output, strict=False):
                    if safe:
                        yield _Equality(column, ast.ParamRef(number=0), relations)

    def _settle(self, scope: _Scope, equalities: Sequence[_Equality]) -> None:
        """Follow the equalities until nothing more becomes safe, then see whether every user's table is constrained."""
        changed = True
        while changed:
            changed = False
            for equality in equalities:
                for one, another in (
                    (equality.left, equality.right),
                    (equality.right, equality.left),
                ):
                    place = scope.find(one) if isinstance(one, ast.ColumnRef) else None
                    if (
                        place is None
                        or place[0] not in equality.about
                        or place[0].is_safe(place[1])
                    ):
                        continue
                    if scope.safe(another):
                        place[0].safe.add(place[1])
                        changed = True
        for relation in scope.relations:
            if relation.table is not None and not relation.is_safe(OWNERS[relation.table]):
                self.found.append(
                    f"{relation.table} AS {relation.name}: {OWNERS[relation.table]} is not constrained"
                )

    def _subqueries(self, expressions: Any, scope: _Scope, ctes: dict[str, Output]) -> None:
        for node in nodes_of(expressions, into_subqueries=False):
            if isinstance(node, ast.SubLink):
                self._query(node.subselect, scope, ctes)
                self._subqueries(node.testexpr, scope, ctes)

    @staticmethod
    def _output(targets: Any, scope: _Scope) -> Output:
        output: Output = []
        for target in targets or ():
            value = target.val
            if isinstance(value, ast.ColumnRef) and isinstance(value.fields[-1], ast.A_Star):
                wanted = value.fields[0].sval if len(value.fields) > 1 else None
                for relation in scope.relations:
                    if wanted in (None, relation.name):
                        if relation.columns is None:
                            return output  # What follows stands at a place that is not known.
                        output += [
                            (column, relation.is_safe(column)) for column in relation.columns
                        ]
                continue
            own = value.fields[-1].sval if isinstance(value, ast.ColumnRef) else ""
            output.append((target.name or own, scope.safe(value)))
        return output


def _table(node: Any) -> _Relation:
    """Make a relation of a table; of a user's only when it is in our schema."""
    ours = node.schemaname in (None, "public") and node.relname in metadata.tables
    columns = list(metadata.tables[node.relname].c.keys()) if ours else None
    return _Relation(
        _alias(node) or node.relname,
        columns,
        table=node.relname if node.relname in OWNERS else None,
    )


def _of_output(name: str, output: Output) -> _Relation:
    return _Relation(
        name, [column for column, _ in output] or None, {column for column, safe in output if safe}
    )


def _renamed(output: Output, names: Any) -> Output:
    given = [each.sval for each in names or ()]
    return [
        (given[n] if n < len(given) else column, safe) for n, (column, safe) in enumerate(output)
    ]


def _alias(node: Any) -> str | None:
    return node.alias.aliasname if node.alias else None


def _name(parts: Any) -> str:
    return str(parts[-1].sval)


def nodes_of(node: Any, *, into_subqueries: bool = True) -> Iterator[Any]:
    """Yield every node of a tree; without `into_subqueries` a SubLink is yielded and not entered."""
    if isinstance(node, list | tuple):
        for each in node:
            yield from nodes_of(each, into_subqueries=into_subqueries)
    elif isinstance(node, ast.Node):
        yield node
        if isinstance(node, ast.SubLink) and not into_subqueries:
            return
        for name in node:
            yield from nodes_of(getattr(node, name), into_subqueries=into_subqueries)
