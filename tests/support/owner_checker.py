"""Checks that every statement is constrained to an owner, and cannot touch other users' data.

A statement passes if, for each table of users' data in it (under any alias, at any depth), the
owner column equals a value that came in as a parameter. That is the parameter itself, or a column
that equals one: of `unnest($n)`, of a subquery or CTE that is fed from it, or of another table that
is constrained in this way. An inserted row must supply such an owner.

An equality counts if no row can bypass it: as a conjunct of WHERE or of the ON of an inner join,
and of the ON of an outer join for the side that may be missing. If the checker cannot decide, the
statement does not pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pglast
from pglast import enums

from service.ids import SYSTEM_USER_ID
from service.store.tables import metadata

# In its types every attribute is optional, although the grammar requires most of them.
ast: Any = pglast.ast

OWNERS = {name: "user_id" for name, table in metadata.tables.items() if "user_id" in table.c} | {
    "users": "id"
}
"""The tables of users' data, with the column of each that holds the owner."""

# Statements of migrations, which change tables and not rows.
_DDL = (
    ast.CreateStmt,
    ast.IndexStmt,
    ast.AlterTableStmt,
    ast.AlterObjectSchemaStmt,
    ast.LockStmt,
    ast.DropStmt,
    ast.RenameStmt,
    ast.CommentStmt,
    ast.CreateStatsStmt,
    ast.VacuumStmt,
)


@dataclass(eq=False)
class _Relation:
    """A relation in a FROM clause, or the target of a write."""

    name: str
    columns: list[str] | None = None
    """Its columns in order; None if they are not known."""
    safe: set[str] = field(default_factory=set)
    """Columns that are known to hold only values of parameters."""
    all_safe: bool = False
    table: str | None = None
    """Name of the table of users' data that it is, if any."""

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
        """Return the relation and the column of a reference; None if they cannot be determined."""
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
        """Return whether an expression holds only values of parameters."""
        match expression:
            case ast.ParamRef():
                return True
            case ast.TypeCast():
                return self.safe(expression.arg)
            case ast.A_Const():
                return getattr(expression.val, "sval", None) == SYSTEM_USER_ID
            case ast.ColumnRef():
                target = self.find(expression)
                return target is not None and target[0].is_safe(target[1])
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
"""Columns that a query returns: their names, and whether they are safe."""


@dataclass(eq=False)
class _Equality:
    """An equality that no row of some relations can bypass."""

    left: Any
    right: Any
    relations: list[_Relation]


class OwnerChecker:
    """Collects the problems of statements."""

    def __init__(self) -> None:
        self.problems: list[str] = []

    def statement(self, node: Any) -> None:
        """Check the tree of a statement."""
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
                self.problems.append("the effect of the statement cannot be determined")
            case _:
                tables = {
                    inner.relname for inner in nodes_of(node) if isinstance(inner, ast.RangeVar)
                } & set(OWNERS)
                self.problems += [
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
            known.pop(cte.ctename, None)  # It hides an outer CTE of the same name.
            if node.withClause.recursive:
                # A reference to itself returns no safe columns.
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
            node.whereClause,
            node.targetList,
            node.havingClause,
            node.groupClause,
            node.sortClause,
            node.limitCount,
            node.limitOffset,
            node.windowClause,
            node.distinctClause,
        ]
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
            is_safe = dict(zip(names, (safe for _, safe in source), strict=False))
            if not is_safe.get(owner):
                self.problems.append(f"{table}: an inserted row's {owner} is not a parameter")
            target.safe.add(owner)
        conflict = node.onConflictClause
        if conflict is not None and conflict.action == enums.OnConflictAction.ONCONFLICT_UPDATE:
            excluded = _Relation("excluded", target.columns, set(target.safe))
            inner = _Scope([target, excluded], parent)
            if owner is not None:
                conflict_columns = [
                    element.name
                    for element in (conflict.infer.indexElems if conflict.infer else None) or ()
                ]
                if owner not in conflict_columns:
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
                self.problems.append(f"{table}: {owner} is set to a value that is not a parameter")

    def _from(
        self,
        item: Any,
        scope: _Scope,
        ctes: dict[str, Output],
        equalities: list[_Equality],
        expressions: list[Any],
    ) -> list[_Relation]:
        """Add the relations, equalities and expressions of a FROM item; return its relations."""
        if isinstance(item, ast.JoinExpr):
            left = self._from(item.larg, scope, ctes, equalities, expressions)
            right = self._from(item.rarg, scope, ctes, equalities, expressions)
            constrained = {
                enums.JoinType.JOIN_INNER: left + right,
                enums.JoinType.JOIN_LEFT: right,
                enums.JoinType.JOIN_RIGHT: left,
            }.get(item.jointype, [])
            equalities += self._conjuncts(item.quals, scope, ctes, constrained)
            expressions.append(item.quals)
            return left + right
        match item:
            case ast.RangeVar() if item.relname in ctes and not item.schemaname:
                relation = _of_output(_alias(item) or item.relname, ctes[item.relname])
            case ast.RangeVar():
                relation = _table(item)
            case ast.RangeSubselect():
                output = self._query(item.subquery, scope if item.lateral else scope.parent, ctes)
                colnames = item.alias.colnames if item.alias else None
                relation = _of_output(_alias(item) or "", _renamed(output, colnames))
            case ast.RangeFunction():
                functions = [call for call, _ in item.functions]
                names = [name.sval for name in (item.alias.colnames if item.alias else None) or ()]
                relation = _Relation(
                    _alias(item) or "", names or None, all_safe=all(map(_Scope([]).safe, functions))
                )
                expressions.append(functions)
            case _:
                self.problems.append(f"a {type(item).__name__} is not supported")
                return []
        scope.relations.append(relation)
        return [relation]

    def _conjuncts(
        self,
        expression: Any,
        scope: _Scope,
        ctes: dict[str, Output],
        only: list[_Relation] | None,
    ) -> Iterator[_Equality]:
        """Yield the equalities that hold for every row of `only`, or of all relations in scope."""
        relations = scope.relations if only is None else only
        match expression:
            case ast.BoolExpr() if expression.boolop == enums.BoolExprType.AND_EXPR:
                for part in expression.args:
                    yield from self._conjuncts(part, scope, ctes, only)
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
                # Only its columns are needed here. Its problems are found with all subqueries.
                output = OwnerChecker()._query(expression.subselect, scope, ctes)
                tested = expression.testexpr
                columns = tested.args if isinstance(tested, ast.RowExpr) else [tested]
                for column, (_, safe) in zip(columns, output, strict=False):
                    if safe:
                        yield _Equality(column, ast.ParamRef(number=0), relations)

    def _settle(self, scope: _Scope, equalities: Sequence[_Equality]) -> None:
        """Apply the equalities until no further column becomes safe, then check all tables."""
        changed = True
        while changed:
            changed = False
            for equality in equalities:
                for side, other_side in (
                    (equality.left, equality.right),
                    (equality.right, equality.left),
                ):
                    target = scope.find(side) if isinstance(side, ast.ColumnRef) else None
                    if target is None:
                        continue
                    relation, column = target
                    if relation not in equality.relations or relation.is_safe(column):
                        continue
                    if scope.safe(other_side):
                        relation.safe.add(column)
                        changed = True
        for relation in scope.relations:
            if relation.table is not None and not relation.is_safe(OWNERS[relation.table]):
                owner = OWNERS[relation.table]
                self.problems.append(
                    f"{relation.table} AS {relation.name}: {owner} is not constrained"
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
                            return output  # The positions of the following columns are not known.
                        output += [
                            (column, relation.is_safe(column)) for column in relation.columns
                        ]
                continue
            name = value.fields[-1].sval if isinstance(value, ast.ColumnRef) else ""
            output.append((target.name or name, scope.safe(value)))
        return output


def _table(node: Any) -> _Relation:
    """Return a table as a relation."""
    is_known = (
        node.schemaname in (None, "public", "chathistory") and node.relname in metadata.tables
    )
    columns = list(metadata.tables[node.relname].c.keys()) if is_known else None
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
    new_names = [name.sval for name in names or ()]
    return [
        (new_names[n] if n < len(new_names) else column, safe)
        for n, (column, safe) in enumerate(output)
    ]


def _alias(node: Any) -> str | None:
    return node.alias.aliasname if node.alias else None


def _name(parts: Any) -> str:
    return str(parts[-1].sval)


def nodes_of(node: Any, *, into_subqueries: bool = True) -> Iterator[Any]:
    """Yield every node of a tree; without `into_subqueries`, not those inside a SubLink."""
    if isinstance(node, list | tuple):
        for item in node:
            yield from nodes_of(item, into_subqueries=into_subqueries)
    elif isinstance(node, ast.Node):
        yield node
        if isinstance(node, ast.SubLink) and not into_subqueries:
            return
        for name in node:
            yield from nodes_of(getattr(node, name), into_subqueries=into_subqueries)
