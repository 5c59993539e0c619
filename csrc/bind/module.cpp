// The Python module memokern._C: addresses and sizes in, the table of one instruction set behind.
// memokern/backends/cpu checks every argument before it calls here.
#include <pybind11/stl.h>

#include "bind/fields.h"

namespace memokern {
namespace {

template <size_t N>
py::dict codes(const NamedCode (&list)[N]) {
  py::dict out;
  for (const NamedCode& entry : list) out[entry.name] = entry.code;
  return out;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "memokern's compiled kernels; called by memokern.backends.cpu";
  select_isa("auto");
  m.def("select_isa", &select_isa, py::arg("name"),
        "Use the kernels of one instruction set ('auto': the widest that runs here); returns its name.");
  m.def("isa", [] { return std::string(kernels().name); }, "The instruction set in use.");
  m.def("width", [] { return kernels().width; }, "Floats of one vector.");
  m.def(
      "integers", [] { return kernels().integers(); },
      "Whether they multiply rows of bytes in integers here.");
  m.def("vnni", [] { return kernels().vnni(); }, "Whether they do it with VNNI.");
  m.def("isas", &isas, "What there is, and whether it runs here: [(name, supported)].");
  m.def(
      "add_isa",
      [](const py::capsule& table, bool supported) {
        const char* name = table.name();
        if (!name || std::string(name) != "memokern.Table")
          throw std::invalid_argument("expected a memokern.Table");
        add_isa(table.get_pointer<Table>(), supported);
      },
      py::arg("table"), py::arg("supported"), "Make the kernels of another module known.");
  m.attr("ROW_TYPES") = codes(kRowTypes);
  m.attr("WEIGHTINGS") = codes(kWeightings);
  m.attr("PROJECTION_SIDE") = kProjectionSide;
  m.attr("MOST_LEVELS") = kMostLevels;
  m.attr("BLOCK_ROWS") = kBlockRows;
  m.attr("PANEL_BLOCKS") = kPanelBlocks;
  m.attr("BOX_COORDINATES") = kBoxCoordinates;
  bind_dense(m);
  bind_listed(m);
}

}  // namespace memokern
