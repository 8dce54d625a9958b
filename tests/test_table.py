from singe.table import table


def test_a_table_keeps_its_columns():
    text = table(["name", "n"], [["a", "1,000"], ["longer", "2"]])
    assert text.splitlines() == ["name        n", "------  -----", "a       1,000", "longer      2"]
    assert table(["a", "b"], []).splitlines() == ["a  b", "-  -"]
    assert table(["a", "b"], [["x", ""]]).splitlines()[-1] == "x"
