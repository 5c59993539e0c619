#include "bind/isa.h"

#include <stdexcept>

namespace memokern {
namespace {

struct Isa {
  const Table* table;
  bool supported;
  bool automatic;  // "auto" may choose it
};

// From the widest to the one that runs everywhere, then what add_isa() added.
std::vector<Isa>& known() {
  static std::vector<Isa> list = {
#ifdef MEMOKERN_HAVE_X86
      {table_avx512(), has_avx512(), true},
      {table_avx2(), has_avx2(), true},
#endif
      {table_baseline(), true, true},
  };
  return list;
}

const Table* current = nullptr;

}  // namespace

const Table& kernels() { return *current; }

std::string select_isa(const std::string& name) {
  std::string all = "auto", usable = "auto";
  for (const Isa& isa : known()) {
    const std::string own = isa.table->name;
    if (isa.supported && (name == own || (name == "auto" && isa.automatic))) {
      current = isa.table;
      return own;
    }
    all += ", " + own;
    if (isa.supported) usable += ", " + own;
  }
  for (const Isa& isa : known())
    if (name == isa.table->name)
      throw std::runtime_error("this processor lacks what '" + name + "' needs; use one of: " + usable);
  throw std::runtime_error("unknown instruction set '" + name + "'; known: " + all);
}

std::vector<std::pair<std::string, bool>> isas() {
  std::vector<std::pair<std::string, bool>> out;
  for (const Isa& isa : known()) out.emplace_back(isa.table->name, isa.supported);
  return out;
}

void add_isa(const Table* table, bool supported) {
  if (table->abi != kAbi) throw std::runtime_error("these kernels are of another build of memokern: build them again");
  for (const Isa& isa : known())
    if (isa.table == table) return;
  known().push_back({table, supported, false});
}

}  // namespace memokern
