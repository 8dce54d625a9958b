"""From rho, a share of a network's cost, to how many neurons each group loses."""
